package app

import (
	"io"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

const (
	logConsole = "console"
	logJSON    = "json"
)

// newLogger returns a logger that writes lines of the format to w.
func newLogger(w io.Writer, format string, level zapcore.Level) *zap.Logger {
	c := zap.NewProductionEncoderConfig()
	c.EncodeTime = zapcore.ISO8601TimeEncoder
	c.EncodeDuration = zapcore.StringDurationEncoder
	var encoder zapcore.Encoder
	if format == logJSON {
		encoder = zapcore.NewJSONEncoder(c)
	} else {
		c.EncodeLevel = zapcore.CapitalLevelEncoder
		encoder = zapcore.NewConsoleEncoder(c)
	}
	return zap.New(zapcore.NewCore(encoder, zapcore.Lock(zapcore.AddSync(w)), level))
}
