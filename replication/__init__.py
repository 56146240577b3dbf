"""Copies hot blocks between regions, and warms nodes before they take traffic.

cli, warmcli       the commands ``kvstore region`` and ``kvstore warm``
├── replicator     a destination's round: pull, bury, plan, copy
│   ├── planner    what to copy, in which order (pure)
│   ├── copier     blocks from bucket to bucket, checked before they are created
│   └── cursor     how far it came, what it has spent
├── publisher      a source's manifest, and purges
│   └── hotset     what is hot in a bucket
└── warmup         hot blocks from the bucket to a node

topology           which regions there are and what may flow (one TOML file)
manifest, keys     the signed form of a hot set
links, rate, lease, names   a bucket over several links; bytes per second; one worker at a time; object names

``kvstore`` does not import this package: its commands come through the entry-point group ``kvstore.commands``.
"""
