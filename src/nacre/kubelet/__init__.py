"""The kubelet: pods of this node, as the API server has them, become calls over the CRI; what happens becomes status and events.

Started by cli; imports config, oci, linux (for pod cgroups and tmpfs) and wire. It meets the API server over HTTPS and the runtime over
its socket, and any CRI runtime will do. It owns `config.kubelet_dir` (volumes, termination logs) and the pod cgroups.

    service   start and stop          pods      one worker a pod, fed by watches     worker   one pod's life
    plan      what to do next (pure)  translate pod to CRI messages (pure)           status   CRI state to pod status (pure)
    volumes   files for pods          resources QoS, cgroups                         pulling  images, back-off
    probes    liveness and the rest   events    Kubernetes events                    node     Node object, lease
    server    node API                logs      CRI log files                        expand   env and $(VAR)
"""
