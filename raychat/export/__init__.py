"""Models on their way in and out: found wherever they are kept, written for other programs, read from them."""
