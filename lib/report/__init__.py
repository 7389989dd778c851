"""Turns records into figures and tables. Nothing here computes a result, or needs torch to draw.

`style` gives figures one look and puts them onto the page with caption and alt text. `figures`
draws curves and points, `relations` one quantity against another, `maps` where classes go,
`overlays` images under the experts of their patches, `routes` whole models; `process` and
`schematic` draw how a method works. `tables` keeps published, reproduced and this build apart,
`matrices` draws them in the shape of a printed table. `text` writes sentences with numbers, `words`
alternative texts, `explorer` is for live notebooks.
"""

import html

# Set against the theme, whose captions are pale, thin and centred.
CAPTION_STYLE = "text-align:left;color:inherit;font:inherit;font-size:0.92em;line-height:1.4"

# links from a page in notebooks/STUDY/: to what says how absent records are computed, and to times
STATUS = '<a href="../../status.html#what-is-not-computed-yet">Status</a>'
SPEED = '<a href="../foundations/speed.html">Speed</a>'
NOT_YET = f"not computed yet (see {STATUS})"


def escaped(text: str) -> str:
    """Escapes a plain text for HTML, but for the links of this module."""
    escaped_text = html.escape(text)
    for link in (STATUS, SPEED):
        escaped_text = escaped_text.replace(html.escape(link), link)
    return escaped_text
