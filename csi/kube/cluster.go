package kube

import (
	"fmt"
	"time"

	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
)

// callTimeout bounds a call to the API server.
const callTimeout = 5 * time.Minute

// InCluster returns clients that reach the API server of the cluster that this process is a pod of. A watch ends after callTimeout
// as well.
func InCluster() (dynamic.Interface, metadata.Interface, error) {
	c, err := rest.InClusterConfig()
	if err != nil {
		return nil, nil, fmt.Errorf("the cluster's API server: %w", err)
	}
	c.Timeout = callTimeout
	objects, err := dynamic.NewForConfig(c)
	if err != nil {
		return nil, nil, fmt.Errorf("the cluster's API server: %w", err)
	}
	meta, err := metadata.NewForConfig(c)
	if err != nil {
		return nil, nil, fmt.Errorf("the cluster's API server: %w", err)
	}
	return objects, meta, nil
}
