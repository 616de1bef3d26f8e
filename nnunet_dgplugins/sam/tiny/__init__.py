"""How ``vit_tiny`` is made: drawn anatomies, random contrasts, promptable training. Not needed to use it."""
