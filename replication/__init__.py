"""Copies hot blocks between regions, and warms nodes before they take traffic.

cli, servicecli, warmcli, show   the commands ``kvstore region``, ``kvstore up`` and ``kvstore warm``
├── service        all that a region does for itself, in one process
│   └── duties     one of them, again and again, by lease
├── replicator     a destination's round: pull, bury, plan, copy
│   ├── planner    what to copy, in which order (pure)
│   ├── copier     blocks from bucket to bucket, checked before they are created
│   └── cursor     how far it came, what it has spent
├── publisher      a source's manifest, and purges
│   └── hotset     what is hot in a bucket
├── evictor        the bucket under its cap
├── retiring       what is kept no longer
│   └── retention  which blocks that are (pure)
├── warmup         hot blocks from the bucket to a node; warmfile: how it fares
└── prime          prompts that nobody has computed, to an engine

topology, site     which regions there are and what may flow (one TOML file); this one, with its own configuration
contents           what a bucket holds, by its catalog or a listing
manifest, keys     the signed form of a hot set
links, rate, lease, names, prompts   a bucket over several links; bytes per second; one worker at a time; object names; files
admin, adminjobs, pause   what the admin API shows and does of it

``kvstore`` does not import this package: its commands come through the entry-point group ``kvstore.commands``.
"""
