// Package cluster tests Croft in a real Kubernetes: etcd, API server, controllers, scheduler, kubelet and containerd, in
// namespaces of their own on this machine, and Croft in it as pods, by the manifests of deploy/.
//
// `make test-cluster` runs it, as root. README.md tells how the cluster is built and started. The tests share one cluster,
// and one node: none runs beside another. Each has a namespace, and looks after it that nothing is left, in the API and in
// the pool.
package cluster
