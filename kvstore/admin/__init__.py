"""The admin API: an HTTP server in a process of its own, which asks the node over its socket as any client does.

    server.py       serve: from configuration to a listening server
    process.py      the server as a child of ``kvstore node``, or inside a region's service
    app.py          create_app: routers, errors, extensions of other packages
    site.py         what routes work with
    node.py         the node as the API sees it: calls, and answers that are kept for a moment (cached.py)
    catalog.py      the region's catalog, likewise
    tokenizers.py   text to token ids
    auth.py         who may do what; tokens.py says who asks, audit.py writes down what was changed
    guard.py        what is refused before any route: foreign hosts and origins, large bodies
    idempotency.py  Idempotency-Key on writes
    problems.py     errors as application/problem+json
    models/         what goes over the wire
    paging.py       pages and their cursors
    jobs.py         long work: kinds, files, progress, cancellation
    kinds.py        the jobs of every node
    routes/         one module a subject
    dashboard/      the page at /: HTML, CSS and ES modules, served as they are
    client.py       AdminClient: the same calls in Python
    openapi.py      docs/openapi.json

Other packages add routes, job kinds and parts of the live snapshot through the entry-point group ``kvstore.admin``: a function
that takes the ``Site`` and returns an APIRouter, or None when it has nothing to add here.
"""
