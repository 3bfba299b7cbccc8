"""The plugin's own training and test loops, on BasicSR's builders."""
