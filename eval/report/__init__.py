"""A page on a run, or on several: what was run, its curves, its groups, what it changed. One file, read in a browser.

collect.py      what a run's folder holds, as plain data for the page
page.py         the HTML file
assets/         the page's own markup, style and script; uPlot draws its curves, KaTeX its LaTeX (both MIT, as they
                are published)
"""

from eval.report import collect, page

__all__ = ["collect", "page"]
