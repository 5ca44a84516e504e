package kube

import (
	"context"
	"time"

	"go.uber.org/zap"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
)

// listAfter is how long follow waits before it lists again, when the API server has ended its watch.
const listAfter = time.Second

// follow calls each for the objects that there are, and for those that are made or change, until ctx ends. An object may
// come again as it was. What fails is logged, and tried again.
func follow(ctx context.Context, r dynamic.ResourceInterface, o metav1.ListOptions, log *zap.Logger, each func(*unstructured.Unstructured)) {
	for ctx.Err() == nil {
		if err := followOnce(ctx, r, o, each); err != nil && ctx.Err() == nil {
			log.Warn("the API server is not heard of: trying again", zap.Error(err))
		}
		select {
		case <-ctx.Done():
		case <-time.After(listAfter):
		}
	}
}

// followOnce is follow until the API server ends the watch.
func followOnce(ctx context.Context, r dynamic.ResourceInterface, o metav1.ListOptions, each func(*unstructured.Unstructured)) error {
	for o.Limit = pageSize; ; {
		page, err := r.List(ctx, o)
		if err != nil {
			return err
		}
		for i := range page.Items {
			each(&page.Items[i])
		}
		if o.Continue = page.GetContinue(); o.Continue == "" {
			o.ResourceVersion = page.GetResourceVersion()
			break
		}
	}
	o.Limit = 0
	w, err := r.Watch(ctx, o)
	if err != nil {
		return err
	}
	defer w.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case e, open := <-w.ResultChan():
			if !open {
				return nil
			}
			switch e.Type {
			case watch.Added, watch.Modified:
				if object, ok := e.Object.(*unstructured.Unstructured); ok {
					each(object)
				}
			case watch.Error:
				return apierrors.FromObject(e.Object)
			}
		}
	}
}
