package csi

import (
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/croftfs/croft/fs/pool"
)

// wantErr fails the test unless an error is want, which may be nil.
func wantErr(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}

// sentinels lists the errors that the files declare, by name.
func sentinels(t *testing.T, dir string) (names []string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	ok(t, err)
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		ok(t, err)
		for _, d := range file.Decls {
			g, is := d.(*ast.GenDecl)
			if !is || g.Tok != token.VAR {
				continue
			}
			for _, s := range g.Specs {
				for _, n := range s.(*ast.ValueSpec).Names {
					if strings.HasPrefix(n.Name, "Err") {
						names = append(names, n.Name)
					}
				}
			}
		}
	}
	return names
}

// notAnswered are the errors of a pool that no call of Pool's methods returns: those of Init, Open and Mount.
var notAnswered = []string{"ErrNotPool", "ErrIsPool", "ErrNotEmpty", "ErrUnsuitable", "ErrNewerFormat", "ErrInUse", "ErrMounted",
	"ErrTier", "ErrNoPassthrough"}

// wrapping are errors that are others as well.
var wrapping = []string{"ErrExistsSame", "ErrSnapshotExistsSame"}

// TestEveryErrorHasACode wants each error of the package, and of a pool, in the table.
func TestEveryErrorHasACode(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "errors.go", nil, parser.SkipObjectResolution)
	ok(t, err)
	var table []string
	ast.Inspect(file, func(n ast.Node) bool {
		c, is := n.(*ast.CompositeLit)
		if !is || len(c.Elts) != 2 {
			return true
		}
		switch e := c.Elts[0].(type) {
		case *ast.Ident:
			table = append(table, e.Name)
		case *ast.SelectorExpr:
			table = append(table, e.X.(*ast.Ident).Name+"."+e.Sel.Name)
		}
		return true
	})
	if len(table) != len(codesOf) {
		t.Fatalf("%d entries were found, and there are %d: %v", len(table), len(codesOf), table)
	}
	for _, name := range sentinels(t, ".") {
		if !slices.Contains(table, name) {
			t.Errorf("%s has no code", name)
		}
	}
	for _, name := range sentinels(t, "../fs/pool") {
		if !slices.Contains(table, "pool."+name) && !slices.Contains(notAnswered, name) && !slices.Contains(wrapping, name) {
			t.Errorf("pool.%s has no code", name)
		}
	}
}

func TestAsStatus(t *testing.T) {
	for _, c := range codesOf {
		for _, err := range []error{c.err, fmt.Errorf("volume a: %w", c.err), fmt.Errorf("%w: %w", errors.New("more"), c.err),
			errors.Join(errors.New("other"), fmt.Errorf("volume a: %w", c.err))} {
			got := asStatus(err)
			if status.Code(got) != c.code || status.Convert(got).Message() != err.Error() {
				t.Errorf("%v becomes %v, want %s", err, got, c.code)
			}
		}
	}
	for _, c := range []struct {
		err  error
		code codes.Code
	}{
		{errors.New("other"), codes.Internal},
		{status.Error(codes.Unimplemented, "x"), codes.Unimplemented},
		{fmt.Errorf("more: %w", status.Error(codes.FailedPrecondition, "x")), codes.FailedPrecondition},
		{pool.ErrExistsSame, codes.AlreadyExists},
		{pool.ErrSnapshotExistsSame, codes.AlreadyExists},
		// The first of the table is what counts, whatever it wraps.
		{fmt.Errorf("%w: %w", ErrNotDeleted, ErrElsewhere), codes.FailedPrecondition},
		{fmt.Errorf("%w: %w", ErrSourceElsewhere, pool.ErrNotFound), codes.ResourceExhausted},
		{fmt.Errorf("%w: %w", ErrArgument, context.Canceled), codes.InvalidArgument},
	} {
		if got := status.Code(asStatus(c.err)); got != c.code {
			t.Errorf("%v becomes %s, want %s", c.err, got, c.code)
		}
	}
	if err := asStatus(nil); err != nil {
		t.Error(err)
	}
}

// TestLongMessage wants what a request has said cut off at a whole character.
func TestLongMessage(t *testing.T) {
	for shift := range 3 {
		m := status.Convert(asStatus(fmt.Errorf("%s%s", strings.Repeat("a", shift), strings.Repeat("漢", maxMessage)))).Message()
		if len(m) > maxMessage || len(m) < maxMessage-10 || !utf8.ValidString(m) || !strings.HasSuffix(m, "漢…") {
			t.Errorf("%d bytes, which end with %q", len(m), m[len(m)-10:])
		}
	}
}
