"""`basicsr report`: one HTML page of tables, charts and crops from results files, for a reader who has only the page.

`collect` reads and groups, `tables`, `charts` and `crops` prepare what is shown, `page` fills in `templates/`.
"""
