// Package check tests what is in deploy/: that each manifest is one that Kubernetes takes, field by field, that the Helm chart
// and the kustomize base do not drift apart, and that what they start knows its flags. It is a module of its own, for
// what it needs (Helm, kustomize, the APIs' types) Croft does not.
package check
