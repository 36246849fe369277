"""The report of an analysis: one page, its numbers and figures (`phatgoose analyse`).

page.py            writes the report's page and files
figures.py         figures of an analysis
report.html.jinja  the page's template
report.css         its style
report.js          its script
explorer.js        the token explorer, for any page
explorer.css       its style
"""
