"""Our tokenizers behind the interfaces of other libraries, so that existing trainers and pipelines take them unchanged."""
