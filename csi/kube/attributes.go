package kube

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"time"

	"go.uber.org/zap"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
)

// askEvery is how often an answer is looked for.
const askEvery = 250 * time.Millisecond

// ErrNoAnswer is returned when a volume's node has not answered yet. It is asked all the same, and answers who asks again.
var ErrNoAnswer = errors.New("the node has not answered yet")

// Change is what is asked of a volume's node.
type Change struct {
	ID         string            `json:"id"`
	Volume     string            `json:"volume"`
	Parameters map[string]string `json:"parameters"`
}

// Answer is what became of a Change: a gRPC status.
type Answer struct {
	ID      string `json:"id"`
	Code    uint32 `json:"code"`
	Message string `json:"message,omitempty"`
}

// keys are where a PV has a question for its node. The label is what the node watches for, so that it is told of
// nothing else.
type keys struct{ change, answer, node string }

func keysOf(driver string) keys {
	return keys{change: driver + "/change", answer: driver + "/answer", node: driver + "/change-on"}
}

// Asker asks the nodes of volumes to change them, by annotations of their PVs: a process that belongs to no node reaches
// none in any other way.
type Asker struct {
	Objects             dynamic.Interface
	Driver, TopologyKey string
}

// Ask returns what the volume's node has answered, and ErrNoAnswer, wrapped, when ctx ends before. It may be repeated, also by
// another process, and then waits for the same answer.
func (a *Asker) Ask(ctx context.Context, pv, handle string, parameters map[string]string) (Answer, error) {
	k := keysOf(a.Driver)
	tick := time.NewTicker(askEvery)
	defer tick.Stop()
	for {
		node, answer, err := a.ask(ctx, k, pv, Change{Volume: handle, Parameters: parameters})
		if answer != nil || err != nil && !apierrors.IsConflict(err) && ctx.Err() == nil {
			if answer == nil {
				answer = &Answer{}
			}
			return *answer, err
		}
		select {
		case <-ctx.Done():
			return Answer{}, fmt.Errorf("PV %s, node %s: %w: is its driver running?", pv, node, ErrNoAnswer)
		case <-tick.C:
		}
	}
}

// ask looks for an answer, which it takes away, and asks when nobody has yet.
func (a *Asker) ask(ctx context.Context, k keys, pv string, want Change) (node string, _ *Answer, _ error) {
	o, err := a.Objects.Resource(pvs).Get(ctx, pv, metav1.GetOptions{})
	if err != nil {
		return "", nil, fmt.Errorf("PV %s: %w", pv, err)
	}
	v, ours, err := parse(o, a.Driver, a.TopologyKey)
	switch {
	case err != nil:
		return "", nil, fmt.Errorf("PV %s: %w", pv, err)
	case !ours || v.handle != want.Volume:
		return "", nil, fmt.Errorf("PV %s is not that of volume %s", pv, want.Volume)
	case len(v.nodes) != 1 || v.unsure:
		return "", nil, fmt.Errorf("PV %s: its affinity does not name one node", pv)
	}
	node = v.nodes[0]
	var asked Change
	var answer Answer
	_ = json.Unmarshal([]byte(o.GetAnnotations()[k.change]), &asked) // none, or one that is not ours: it is replaced
	_ = json.Unmarshal([]byte(o.GetAnnotations()[k.answer]), &answer)
	if asked.ID == "" || asked.Volume != want.Volume || !maps.Equal(asked.Parameters, want.Parameters) {
		want.ID = rand.Text()
		text, err := json.Marshal(want)
		if err != nil {
			return node, nil, err
		}
		return node, nil, annotate(ctx, a.Objects, v, map[string]any{k.change: string(text), k.answer: nil}, map[string]any{k.node: node})
	}
	if answer.ID != asked.ID {
		return node, nil, nil
	}
	if err := annotate(ctx, a.Objects, v, map[string]any{k.change: nil, k.answer: nil}, map[string]any{k.node: nil}); err != nil {
		return node, nil, err
	}
	return node, &answer, nil
}

// annotate changes annotations and labels of a PV, if it is what was read; nil takes one away.
func annotate(ctx context.Context, c dynamic.Interface, v volume, annotations, labels map[string]any) error {
	meta := map[string]any{"uid": v.uid, "resourceVersion": v.resourceVersion, "annotations": annotations}
	if labels != nil {
		meta["labels"] = labels
	}
	body, err := json.Marshal(map[string]any{"metadata": meta})
	if err == nil {
		_, err = c.Resource(pvs).Patch(ctx, v.name, types.MergePatchType, body, metav1.PatchOptions{})
	}
	if err != nil {
		return fmt.Errorf("PV %s: %w", v.name, err)
	}
	return nil
}

// Changer changes the volumes of a node as they are asked to be.
type Changer struct {
	Objects             dynamic.Interface
	Driver, TopologyKey string
	Node                string
	// Change changes a volume, and returns a gRPC status. It may be asked for what is so already.
	Change func(ctx context.Context, volume string, parameters map[string]string) (code uint32, message string)
	Logger *zap.Logger
}

// Run answers until ctx ends. What fails is logged, and tried again.
func (c *Changer) Run(ctx context.Context) {
	o := metav1.ListOptions{LabelSelector: keysOf(c.Driver).node + "=" + c.Node}
	follow(ctx, c.Objects.Resource(pvs), o, c.Logger, func(pv *unstructured.Unstructured) { c.answer(ctx, pv) })
}

// answer does what a PV asks for, once.
func (c *Changer) answer(ctx context.Context, o *unstructured.Unstructured) {
	k := keysOf(c.Driver)
	var asked Change
	var answer Answer
	if err := json.Unmarshal([]byte(o.GetAnnotations()[k.change]), &asked); err != nil || asked.ID == "" {
		return // it has been answered
	}
	_ = json.Unmarshal([]byte(o.GetAnnotations()[k.answer]), &answer)
	v, ours, err := parse(o, c.Driver, c.TopologyKey)
	switch {
	case answer.ID == asked.ID:
		return
	case err != nil || !ours || v.handle != asked.Volume || len(v.nodes) != 1 || v.nodes[0] != c.Node:
		c.Logger.Warn("a PV asks for a change that is not this node's", zap.String("pv", o.GetName()), zap.Error(err))
		return
	}
	answer = Answer{ID: asked.ID}
	answer.Code, answer.Message = c.Change(ctx, asked.Volume, asked.Parameters)
	log := c.Logger.With(zap.String("pv", v.name), zap.Any("parameters", asked.Parameters), zap.Uint32("code", answer.Code), zap.String("message", answer.Message))
	text, err := json.Marshal(answer)
	if err == nil {
		// Of any resource version: who has asked for something else meanwhile sees that the answer is not for that.
		v.resourceVersion = ""
		err = annotate(ctx, c.Objects, v, map[string]any{k.answer: string(text)}, nil)
	}
	log.Info("a volume's attributes were to change", zap.Error(err))
}
