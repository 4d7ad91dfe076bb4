"""Image folders, webdataset shards, decoding, cropping, batches; the small sample sets."""
