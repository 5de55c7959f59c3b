"""The contract between agent and control plane: openinfra.proto and its generated stubs."""
