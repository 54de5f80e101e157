// Command etcd is the key-value store behind the API server, built from etcd's server module:
// the release's own main package lives in a module that replaces its siblings by path.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() {
	etcdmain.Main(os.Args)
}
