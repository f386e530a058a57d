"""Lower precision: ranges from calibration data, a plan of what runs in which precision, and Q/DQ nodes in the graph.

`calibrators` and `collect` find ranges, `weights` and `plan` decide, `placement` and `dynamic` write the graph, and
`structure` checks what was written.
"""
