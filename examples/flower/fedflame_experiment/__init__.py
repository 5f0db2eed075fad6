"""A Flower app whose ServerApp runs fedflame's rounds."""
