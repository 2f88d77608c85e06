"""For authors of methods and backbones: tiny offline pipelines (`testing.tiny`)."""
