"""Turns records into figures and tables. Nothing here computes a result, or needs torch to draw.

`style` gives figures one look and puts them onto the page with caption and alt text. `figures`
draws curves and points, `relations` one quantity against another, `maps` where classes go,
`overlays` images under the experts of their patches, `routes` whole models; `process` and
`schematic` draw how a method works. `tables` keeps published, reproduced and this build apart,
`matrices` draws them in the shape of a printed table. `text` writes sentences with numbers, `words`
alternative texts, `explorer` is for live notebooks.
"""

# Set against the theme, whose captions are pale, thin and centred.
CAPTION_STYLE = "text-align:left;color:inherit;font:inherit;font-size:0.92em;line-height:1.4"
