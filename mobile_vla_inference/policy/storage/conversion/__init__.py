"""Parts of a conversion that need no torch: what is written, config.json, the hash of the source, publishing whole."""
