"""Engine connectors. They use only kvstore's client side."""
