"""Controllers limit the draft of each step: by a fixed K, by recent acceptance, or by measured costs."""
