"""The per-machine process and its clients.

api.py       what a client may ask and what it gets back
arena.py     the shared mapping: made by the node, attached by clients
protocol.py  frames: encoding, bounds, handshake
server.py    the process
client.py    Client (sync) and AsyncClient
"""
