"""A page in the browser to play with tokenizers: `toklab app`."""
