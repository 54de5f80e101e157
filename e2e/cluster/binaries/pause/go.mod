module llmfleet.io/e2e/cluster/binaries/pause

go 1.26.0
