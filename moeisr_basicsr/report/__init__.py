"""One HTML page of what results documents hold: tables, charts and crops, for a reader who has nothing but the page.

From file to page: `collect` reads and groups, `tables`, `charts` and `crops` draw, `page` puts together.
"""
