"""The kubelet: pods of this node, as the API server has them, become calls over the CRI; what happens becomes status and events.

Started by cli; imports config, oci, linux (for pod cgroups and tmpfs), wire, and of images how names and credentials are read. It meets the
API server over HTTPS and the runtime over its socket, and any CRI runtime will do. It owns `config.kubelet_dir` (volumes, termination logs)
and the pod cgroups.

    service   start and stop                     pods      one worker a pod, fed by watches   worker    one pod's life: a loop
    plan      what to do next (pure)             life      one pod, held and known            making    what brings it up
    ending    what takes it down                 translate pod to CRI messages (pure)         status    CRI state to status (pure)
    expand    environment and $(VAR)             volumes   files for pods                     resources QoS, limits, cgroups
    pulling   images, back-off                   probes    liveness and the rest              hooks     postStart, preStop
    events    Kubernetes events                  host      what workers share                 objects   ConfigMaps, Secrets followed
    manifests static pods                        node      Node object, lease                 server    node API
    logs      CRI log files read                 rotation  logs that have grown               orphans   what dead pods left
    watching  changes of files
"""
