"""Select the layers of a model to adapt. Nothing here changes a model. A name that matches nothing is an error."""
