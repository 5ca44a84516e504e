// Package manifests tests what is in deploy/: that each manifest is one that Kubernetes takes, field by field, that the Helm
// chart and the kustomize base do not drift apart, and that what they start knows its flags. Helm is $HELM.
package manifests
