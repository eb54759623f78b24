"""LocoProp against first- and second-order methods: its problems, methods and ablations."""
