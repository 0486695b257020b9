"""Tables, figures and the HTML page of an evaluation."""
