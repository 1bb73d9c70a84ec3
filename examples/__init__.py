"""Programs to read and run. A package, since others install one of that name, which would hide a mere folder."""
