"""One recipe per file; :mod:`fastreg.recipes.catalogue` finds them."""
