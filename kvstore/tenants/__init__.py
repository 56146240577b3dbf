"""Several tenants on one node. ``docs/tenants.md`` says what that promises.

    book.py         who they are: a file with their secrets, tokens, users and quotas
    credentials.py  what a client shows when it connects
    ledger.py       whose the blocks of a tier are: keys and bytes by tenant
    fairness.py     who pays when the tier that tenants share is full
    own.py          a tenant's part of such a tier, under its quota
    shared.py       the shared tiers, as they are opened
    namespaces.py   the namespaces of one tenant
    pipelines.py    a tenant's arena, store and verbs over the shared tiers
    verbs.py        what operators ask about tenants
    whole.py        the node as a whole, for operators
    metrics.py      every tenant's metrics, by name

A tenant has an arena and an index of its own, so that nothing of another tenant's can be read, looked up or listed, whatever
keys a client has got hold of. Only disk and bucket are shared, and each tenant sees its own part of them.
"""
