"""The OCI runtime specification's types, rules and files, and the failure that every layer shares.

Standard library only: runs on the hot path, in the zygote and in the guest. Imports `nacre.linux` alone. Owns the format of the
state files under a runtime's root (`state`), never the directory they lie in.
"""
