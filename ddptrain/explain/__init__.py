"""`ddptrain explain`: which parts of its inputs the outputs of a finished run go back to."""
