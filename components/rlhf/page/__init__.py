"""Self-contained HTML pages: one style, and charts as inline SVG. Nothing is loaded, and nothing needs a script to be read.

Imports: text.
Packages: jinja2, markupsafe.

It knows nothing of models and stages.
"""
