"""How the figures and the embedded model are made; not in the wheel."""
