"""What a run is asked to do: options, model files, and how they become one resolved, checked record."""
