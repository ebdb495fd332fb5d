NASTY = {}
