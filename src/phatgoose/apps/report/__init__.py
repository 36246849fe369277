"""The report of an analysis: one page, its numbers and figures (`phatgoose analyse`).

page.py            writes the report's page and files
contents.py        the page's sections: their tables and figures
figures.py         figures of an analysis
assets.py          reads the files that pages are made of
report.html.jinja  the page's template
report.css         its style
report.js          its script
explorer.js        the token explorer, for any page
explorer.css       its style
"""
