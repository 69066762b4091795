"""Pages for a browser: `python demo/chat.py`, `python demo/composition.py`, or `ixc2 web` for both."""
