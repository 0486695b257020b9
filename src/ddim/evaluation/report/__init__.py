"""Tables, pictures and one HTML page of what was measured."""
