package kube

import (
	"fmt"
	"time"

	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
)

// callTimeout bounds a call to the API server.
const callTimeout = 30 * time.Second

// InCluster makes the clients of o reach the API server of the cluster that this process is a pod of.
func (o *Options) InCluster() error {
	c, err := rest.InClusterConfig()
	if err != nil {
		return fmt.Errorf("the cluster's API server: %w", err)
	}
	c.Timeout = callTimeout
	if o.Objects, err = dynamic.NewForConfig(c); err == nil {
		o.Metadata, err = metadata.NewForConfig(c)
	}
	if err != nil {
		return fmt.Errorf("the cluster's API server: %w", err)
	}
	return nil
}
