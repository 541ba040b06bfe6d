"""How ranks are started, and where their run lives."""
