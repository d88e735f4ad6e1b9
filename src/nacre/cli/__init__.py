"""The `nacre` command and the node's daemon: everything a person starts by hand.

Called by people and by `./run`; may import every package of nacre, each of them only where it is used, so that `nacre --version`
costs a few milliseconds. Owns the process of a node (`node`), its control socket STATE/node.sock and its logs LOGS/../*.log.
Only this package prints for people and only it exits; all others raise `oci.errors.Failure`.

    main      the group of commands, loaded one by one          node      the daemon: four services in one loop
    output    sentences, tables and failures on a terminal      control   JSON lines between command and daemon
    host      what of this node is on the host (a census)       sweep     what takes it off again, for down and reset
"""
