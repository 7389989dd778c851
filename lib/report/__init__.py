"""Records in, figures and tables out. Nothing here computes a result, reads a file or needs torch.

`style` is the one look and puts a figure on the page with caption and alt text; `figures` draws
curves and points, `maps` where classes and tokens go; `tables` keeps published, reproduced and this
build apart; `explorer` is for live notebooks.
"""

# Set against the theme, whose captions are pale, thin and centred.
CAPTION_STYLE = "text-align:left;color:inherit;font:inherit;font-size:0.92em;line-height:1.4"
