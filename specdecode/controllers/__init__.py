"""How long to draft: a fixed K, an adaptive one, or what pays by measured costs."""
