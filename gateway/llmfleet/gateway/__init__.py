"""llmfleet's gateway: the OpenAI-compatible data plane in front of a fleet of engines.

    discovery  --Fleet-->  transport (DataPlane)  --asks-->  policy (Router)
    (API server, or a        bytes, sockets,                 pure: which engine,
     static list)            deadlines, errors               what was demanded

Three parts that meet in three narrow places. `fleet.Fleet` is an immutable snapshot of services and engines that
discovery pushes. `policy.Router` holds every decision and no I/O; its clock is injected, so that the simulator runs
the same code. `transport.DataPlane` moves bytes and knows neither Kubernetes nor the plan.

One process holds all of it today. Nothing that discovery or the admin port needs is shared with the data plane but a
`Fleet` going in and a `DemandReport` coming out, so that the data plane can become one worker process per core, fed
by one control process, without a change to policy or discovery.
"""
